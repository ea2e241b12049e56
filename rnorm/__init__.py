"""What the study's scripts stand on. `rnorm.layers.LocallyConnected2d` is for anyone's network."""
