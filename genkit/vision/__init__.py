"""What image models do: sample, imagine, walk a latent space, look inside diffusion."""
