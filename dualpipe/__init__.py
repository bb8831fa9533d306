"""What each pipeline rank does in one training step, and when: schedules as plain data, and everything that reads them.

Standard library only, except for the runtime modules, which drive torch.
"""
