"""What a stage consists of: its config, the parts built from it, its data, and what is measured on the way.

The scripts show the loops; here is what stands around them and knows both a model and the trainer.
"""
