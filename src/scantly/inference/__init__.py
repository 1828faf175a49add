"""From a trained model to predictions in the geometry of their inputs."""
