"""Folding live edits into a LoRA that answers without demonstrations (DistillMIKE)."""
