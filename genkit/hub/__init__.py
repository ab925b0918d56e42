"""What is trusted, downloaded, staged and pushed; model cards."""
