"""What can be wrong with a reward, tried before a run?"""
