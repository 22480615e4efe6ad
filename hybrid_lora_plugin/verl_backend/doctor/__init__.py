"""What of Hybrid-LoRA works with the libraries that are installed: ``hybrid-lora-doctor``, and the gate of a run.

The table of ``contracts`` says which feature needs which symbol of another library. Three looks at it, each deeper and
slower than the one before:

``source``  the text of the libraries, importing nothing: seconds; a run asks this much before it starts (``gate``)
``import``  the libraries themselves, with signatures: half a minute, in a process of its own (``child``)
``run``     a step of verl's engine and a sync in every mode into a real vLLM, both tiny: about a minute (``trial``)

``environment``  versions, devices and attention kernels
``report``       what was found, by feature, as tables and as JSON
"""
