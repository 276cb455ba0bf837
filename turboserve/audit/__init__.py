"""An independent check of a simulated run, from its files alone.

Nothing here is shared with the simulator or the policies: other readers, other arithmetic. A fault would
have to be made twice, in two shapes, to pass. Only the exception types are common.
"""
