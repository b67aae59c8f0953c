from neumuter_kernels import reference as _r
import torch as _t, collections as _c
MutedNeurons=_c.namedtuple("MutedNeurons","indptr indices gains")
def _m2(m): return m if m.dim()==2 else m[None]
def masked_glu(gate=None, up=None, mask=None, row_ids=None, activation="silu", gate_up=None, interleaved=False):
    if gate_up is not None: return _r.masked_glu_packed(gate_up,_m2(mask),row_ids,activation,interleaved)
    return _r.masked_glu(gate,up,_m2(mask),row_ids,activation)
def masked_act(hidden, mask, row_ids=None, activation="gelu_tanh"): return _r.masked_act(hidden,_m2(mask),row_ids,activation)
class _HC(_t.autograd.Function):
    @staticmethod
    def forward(ctx,s,ids,*a): ctx.save_for_backward(s,ids); ctx.a=a; return _r.hard_concrete(s,ids,*a)
    @staticmethod
    def backward(ctx,g): s,ids=ctx.saved_tensors; return (_r.hard_concrete_backward(g,s,ids,*ctx.a),None,*([None]*len(ctx.a)))
def hard_concrete(scores, rows, seed, step, layer, sample_ids=None, temperature=1/3, stretch=(-0.1,1.1), training=True):
    ids=_t.arange(rows) if sample_ids is None else sample_ids
    return _HC.apply(scores,ids,seed,step,layer,temperature,stretch,training)
def select_muted(scores,budget=None,threshold=None):
    w=[scores.shape[1]]*scores.shape[0] if isinstance(scores,_t.Tensor) else [len(s) for s in scores]
    f=scores.reshape(-1) if isinstance(scores,_t.Tensor) else _t.cat(list(scores))
    k=int(budget*f.numel()+1e-6) if isinstance(budget,float) else budget
    return MutedNeurons(*_r.select_muted(f.detach(),w,k,_r.logit(threshold) if threshold is not None else None))
