"""The default model, made from nothing but this package: demonstrations, tokenizer, training, card."""
