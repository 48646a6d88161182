"""What the three families share: attention, the prefix encoder, the loss, the language-model head."""
