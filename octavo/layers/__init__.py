"""The parts that decoders are made of: each holds its weights and says which ops it wants, in which order."""
