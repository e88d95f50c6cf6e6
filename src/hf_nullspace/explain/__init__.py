"""Saliency maps of ViT and DeiT: raw attention, rollout, Grad-CAM, generic relevance, LRP."""
