#!/usr/bin/env bash
# GRPO in verl 0.9 on GSM8K, with a KL budget instead of a learning rate: the last two settings.
# Usage: examples/verl_budget.sh Qwen/Qwen2.5-0.5B-Instruct [more overrides]
# The data: verl's examples/data_preprocess/gsm8k.py.
# In verl's environment, this package without its own dependencies: pip install --no-deps <this repository>
set -euo pipefail
python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files="$HOME/data/gsm8k/train.parquet" \
  data.val_files="$HOME/data/gsm8k/test.parquet" \
  data.train_batch_size=256 \
  data.max_prompt_length=512 \
  data.max_response_length=512 \
  actor_rollout_ref.model.path="$1" \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
  trainer.n_gpus_per_node=1 \
  trainer.nnodes=1 \
  trainer.total_epochs=1 \
  actor_rollout_ref.model.external_lib=open_r1_capo.plugins.verl \
  'actor_rollout_ref.actor.optim.override_optimizer_config={kl_budget:{entropy_share:0.003}}' \
  "${@:2}"
