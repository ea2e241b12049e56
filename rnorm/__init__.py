"""What the scripts of the study stand on; nothing in here imports a script."""
