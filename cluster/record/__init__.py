"""What does a run write down?"""
