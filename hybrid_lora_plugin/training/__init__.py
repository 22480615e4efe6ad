"""The hybrid model: apply an allocation, keep the base, merge, save, export. No verl in here.

``apply``      LoRA on exactly the modules that are not fully tuned; the counts of parameters
``merge``      the one formula that turns base and factors into a plain weight
``reference``  the original values of the fully tuned weights, swapped in for the reference policy
``trainables`` what training changed, as safetensors
``export``     a plain Hugging Face folder from base checkpoint and trainables
"""
