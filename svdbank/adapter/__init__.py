"""Adapters: PEFT folders written and read without PEFT, and the check that a bank belongs to a loaded model."""
