"""What `convert verify` proves: checksums, key lists, config, the inverse conversion, logits."""
