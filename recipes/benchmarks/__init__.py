"""What the correction costs."""
