-- Quarto makes the words in brackets before a picture its caption; here they are its alternative text, too
function Image(img)
  if not img.attributes['fig-alt'] then img.attributes['fig-alt'] = pandoc.utils.stringify(img.caption) end
  return img
end
