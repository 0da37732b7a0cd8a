"""Plan of what is read and decomposed, made from a configuration and the headers of the pretrained weights."""
