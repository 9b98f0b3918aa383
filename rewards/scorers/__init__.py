"""What is an image worth, for its prompt?"""
