import sys, time, json, torch
sys.path.insert(0,'tools')
import train_trellis as tt
from tersor.codecs.trellis.filters import filters
from tersor.codecs.trellis import viterbi
from tersor.ops.trellis_path.launch import states
torch.manual_seed(0)
for key,f in filters().items():
    if f.memory>15: continue
    x=torch.randn(64,256,device="cuda")
    s=states(x, viterbi.values(f).cuda()[None].contiguous(), f.memory, f.shifts, 48)
    b=viterbi.bits_of(f,s.long()); r=viterbi._encode(f,x)
    e=tt.distortion(torch.tensor(f.taps,device="cuda"),f.shifts)
    big=torch.randn(65536,256,device="cuda"); t=viterbi.values(f).cuda()[None].contiguous()
    states(big[:4096],t,f.memory,f.shifts,48); torch.cuda.synchronize(); a=time.perf_counter(); states(big,t,f.memory,f.shifts,48); torch.cuda.synchronize(); d=time.perf_counter()-a
    print(key,'agree',float((b==r).float().mean()),'mse %.5f'%e,'16.7M in %.3f s'%d,flush=True)
