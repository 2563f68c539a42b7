"""An ablation from training to verdict: its file (`spec`), its work (`run`), and what it says (`report`)."""
