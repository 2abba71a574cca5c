"""What the policy computes: forward passes, sampling and attention of a loaded LLaVA model. Read the modules in this order.

- `umed_plugin.model.forward`: prompts and answers as tensors, the teacher-forced pass, log-probabilities
- `umed_plugin.model.output_layer`: logits of some positions alone, or log-probabilities in place of logits
- `umed_plugin.model.packing`: K answers behind one prompt in a single row, with a block mask
- `umed_plugin.model.kv_cache`: the KV cache of the K candidates while they are sampled, and while they are scored
- `umed_plugin.model.sampling`: the token loop; `SamplingSettings`
- `umed_plugin.model.token_spans`: which tokens of an answer name an abnormality
- `umed_plugin.model.attention`: how much of these tokens' attention falls on the lesion (vision relevance)
- `umed_plugin.model.heat_map`: the same attention as a map, for the eye
- `umed_plugin.model.sharding`: full parameters under ZeRO-3
- `umed_plugin.model.shared_prefix`: questions about one image share its encoding and its KV cache
- `umed_plugin.model.server_sampling`: a rollout server samples instead of this process
- `umed_plugin.model.server_comparison`: whether that server holds the same model
- `umed_plugin.model.answerer`: a checkpoint loaded for answering; `AnswererSettings`
"""
