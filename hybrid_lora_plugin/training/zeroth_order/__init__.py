"""Full weights without a gradient: two forward passes tell how a loss changes along a random direction.

For a direction z of ±1 and a small ε (MeZO, arXiv 2305.17333; beside adapters, arXiv 2604.09940):

    c = (f(w + εz) − f(w − εz)) / 2ε          w ← w − rate · c · z

``choice``     which weights move
``signs``      z, from an integer hash of (seed, parameter, index in the whole tensor)
``weights``    float32 masters of the frozen weights, from which what the model holds is written afresh
``two_point``  the step over K directions, and the mean of a loss over ranks
``move_log``   every move that was made, as JSON; replayed on the base model it gives the trained weights bit for bit
"""
