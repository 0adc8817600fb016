"""Distributed training of a small classifier. Run: torchrun --standalone --nproc-per-node 2 THIS_FILE"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def make_data(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 20, generator=generator)
    labels = (inputs[:, :10].sum(1) > inputs[:, 10:].sum(1)).long()
    return TensorDataset(inputs, labels)


def evaluate(model, loader, device):
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for inputs, labels in loader:
            outputs = model(inputs.to(device))
            totals[0] += (outputs.argmax(1) == labels.to(device)).sum()
            totals[1] += len(labels)
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def main(args):
    use_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)

    train_set, test_set = make_data(args.samples), make_data(args.samples // 4, seed=1)
    sampler = DistributedSampler(train_set, shuffle=True, seed=args.seed)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, sampler=sampler)
    test_sampler = DistributedSampler(test_set, shuffle=False)
    test_loader = DataLoader(test_set, batch_size=256, sampler=test_sampler)

    model = nn.Sequential(nn.Linear(20, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 2)).to(device)
    model = DDP(model, device_ids=[local_rank] if use_cuda else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for inputs, labels in train_loader:
            loss = criterion(model(inputs.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = evaluate(model, test_loader, device)
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.6f}, accuracy {accuracy:.4f}", flush=True)
            torch.save({"epoch": epoch, "model": model.module.state_dict()}, args.checkpoint)
    if rank == 0:
        print(f"trained on {world_size} ranks, checkpoint in {args.checkpoint}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--checkpoint", default="checkpoint.pt")
    args = parser.parse_args()
    main(args)
