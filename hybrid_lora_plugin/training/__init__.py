"""The hybrid model: apply an allocation, keep the base, merge, save, export. No verl in here.

``apply``         LoRA on exactly the modules that are not fully tuned; the count of parameters
``lora_linear``   PEFT's LoRA layer with fewer passes over memory
``merge``         the one formula that turns base and factors into a plain weight
``reference``     the original values of the fully tuned weights, swapped in for the reference policy
``checkpoint``    what training changed, as safetensors
``export``        a merged model, a PEFT adapter or a delta from that and the base checkpoint, one weight at a time:
                  ``trained`` and ``base_model`` read them, ``model_folder``, ``adapter_folder``, ``delta`` and
                  ``model_card`` write
``zeroth_order``  frozen weights that move without a gradient, by two forward passes along a random direction
``precision``  ``memory``  ``dtensor``    dtypes, bytes of a rank, shards
"""
