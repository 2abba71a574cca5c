"""Both training stages: data, trainer, rollouts, advantages, objective, validation and what is logged."""
