"""What trains and judges the corrections of one recipe."""
