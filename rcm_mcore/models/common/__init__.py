"""What every diffusion transformer here is made of."""
