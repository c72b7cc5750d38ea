"""What several test modules share; tests do not import each other."""
