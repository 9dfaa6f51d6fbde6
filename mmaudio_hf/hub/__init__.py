"""What travels to the Hub and back: networks and runs with their cards, and feature stores."""
