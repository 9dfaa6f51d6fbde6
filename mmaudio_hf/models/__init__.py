"""The flow network and flow matching."""
