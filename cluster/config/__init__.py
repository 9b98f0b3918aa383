"""What did the user ask for, and can it be?"""
