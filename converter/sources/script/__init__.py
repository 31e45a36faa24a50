"""Is a TorchScript archive a network, and nothing else? Found out before torch reads it."""
