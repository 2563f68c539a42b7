"""An ablation, from training to verdict."""
