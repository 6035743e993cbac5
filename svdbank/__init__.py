"""svdbank: a base model is decomposed once; every adapter after that is a lookup."""
