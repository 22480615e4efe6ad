"""How near a rollout engine's policy is to the trainer's, once its weights have been rounded."""
