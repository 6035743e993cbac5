"""Several adapters of one base: merged into one, stacked so that each can be taken out again, compared."""
