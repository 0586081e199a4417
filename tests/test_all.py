"What `from fgsynth.all import *` promises"

def test_names_that_users_rely_on():
    "Every name of the design is there with one import"
    names = """get_dataset ssl_dls labelled_dls ssl_learner MoCoV2 SimSiam SimCLR BYOL DINO SSLMethod synth_pairs
        save_encoder load_encoder finches FinchItem Items label_fraction Views mocov2_views simsiam_views
        create_encoder num_features MLPHead Decoder info_nce nt_xent neg_cosine min_max cam_scores FeatureBank
        low_variance cam_noise var_noise random_noise perturb DecoderCallback PerturbCallback SynthPairCallback
        features linear_probe retrieval knn show_pairs show_attention show_variance Explorer CheckpointCallback
        HealthCallback Saliency Synthesis""".split()
    star = {}; exec('from fgsynth.all import *', star)
    assert not (missing := [n for n in names if n not in star]), missing
