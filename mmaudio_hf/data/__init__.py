"""The feature store and the way it is read during training."""
