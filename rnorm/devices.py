import torch
class DeviceError(Exception): pass
def pick_device(name): return torch.device("cuda" if name=="cuda" else "cpu")
def set_precision(p): torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = p == "tf32"
def describe(d): return {"device": str(d)}
def several_gpus_note(d): return ""
