"""From a checkpoint to a bank: planning, building, and where banks live."""
