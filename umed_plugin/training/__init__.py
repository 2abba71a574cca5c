"""Both training stages. Read the modules in this order; each imports only from those above it.

Stage 1, Abnormal-Aware Instruction Tuning (LLaVA's own trainer):

- `umed_plugin.training.replay`: the records of the highest loss twice
- `umed_plugin.training.tuning_data`: LLaVA's dataset over grounded records
- `umed_plugin.training.supervision_check`, `umed_plugin.training.teacher_check`: before training starts, which tokens are
  supervised, and whether the teachers fit
- `umed_plugin.training.reference`: the weights as they were at the start, the teacher of `keeping` and stage 2's reference policy
- `umed_plugin.training.keeping`, `umed_plugin.training.attending`, `umed_plugin.training.tower_teaching`: further losses
- `umed_plugin.training.trained_tower`: the vision tower's own learning rate
- `umed_plugin.training.tuning_trainer`: LLaVA's trainer with these

Stage 2, Abnormal-Aware Rewarding:

- `umed_plugin.training.advantages`: where advantages are computed, for GRPO and PPO; the weight of the KL
- `umed_plugin.training.value_head`: the value network of PPO
- `umed_plugin.training.feature_cache`: the frozen vision tower's features on disk
- `umed_plugin.training.sampler`, `umed_plugin.training.rewarding_data`: the order of the queries, and the queries
- `umed_plugin.training.experience`: what updates learn from, split into minibatches
- `umed_plugin.training.objective`: the losses of GRPO and PPO
- `umed_plugin.training.candidate_log`, `umed_plugin.training.step_metrics`: what is logged
- `umed_plugin.training.answer_packing`: whether the answers to a query share its prompt
- `umed_plugin.training.candidate_sampling`, `umed_plugin.training.answer_passes`: the parts of a rollout that run the model
- `umed_plugin.training.dynamic_sampling`: replaces groups without signal
- `umed_plugin.training.experience_maker`: one rollout: candidates are sampled, log-probabilities of the old and the reference
  policy are taken, rewards are collected (IoU is `umed_plugin.rewards.terms.localization`)
- `umed_plugin.training.rollouts`: which sampled answers each batch learns from; rollouts in checkpoints
- `umed_plugin.training.validation`: held-out validation while training runs
- `umed_plugin.training.stopping`, `umed_plugin.training.rewarding_state`: stop with a checkpoint, and resume from it
- `umed_plugin.training.trainer`: the training step, optimizer and checkpoints

The KV cache of the K candidates is `umed_plugin.model.kv_cache`, filled by `umed_plugin.model.sampling`.
"""
