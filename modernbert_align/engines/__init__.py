"""What runs both models side by side and yields records."""
