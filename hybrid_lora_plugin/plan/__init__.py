"""What a run will need before it is started: ``hybrid-lora-plan``. No GPU, no weights, no verl.

run           what of a run decides bytes and operations; ``verl_backend.planned_command`` reads it from a command
model         the trained model with shapes and no memory, and its parameters
live_bytes    bytes of the tensors alive while code runs, on tensors with or without memory
activations   a few decoder layers run forward and backward without memory
logits        what the loss holds of [tokens, vocabulary]
training      what each GPU holds of weights, gradients and optimizer, and what FSDP gathers
rollout       vLLM: weights, keys and values, copies in the host's memory while it sleeps
sync_bytes    what a weight sync sends, by mode
probe_memory  what a probe holds on each device and on the host, by moment
probe_passes  its layers, run like those of activations
compute       operations of a step, of the probe, and time under stated assumptions
planner       all of it: one plan
changes       what to change where it does not fit, each planned anew
table, picture  for people
"""
