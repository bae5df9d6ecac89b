"""Use a device from asyncio: transfers in parallel, input while other tasks run, a transfer that is cancelled.

With an address (HOST:PORT, [IPV6]:PORT or unix:/PATH) as argument, the device there is described. Without one, a
test device is served by the same loop, and its endpoints are tried.
"""

import asyncio
import sys

from usbredir import aio, requests
from usbredir.descriptors import parse_configuration, parse_device
from usbredir.proto import Status
from usbredir.virtual import LoopbackDevice


async def describe(guest: aio.Guest) -> None:
    """Print the device's identity and its interfaces."""
    device = parse_device(await guest.get_descriptor(1))
    print(f"device {device.vendor_id:04x}:{device.product_id:04x}")
    for interface in parse_configuration(await guest.get_descriptor(2, length=4096)).interfaces:
        print(f"  interface {interface.number}, alternate setting {interface.alternate}")


async def watch_input(guest: aio.Guest, count: int) -> list[int]:
    """Some packets of the interrupt endpoint; receiving stops when the loop is left."""
    seen: list[int] = []
    async for _, data in guest.interrupts(0x83):
        seen.append(int.from_bytes(data, "little"))
        if len(seen) == count:
            break
    return seen


async def try_endpoints(guest: aio.Guest) -> None:
    """Several things at once, with the endpoints of the loopback device."""
    watching = asyncio.create_task(watch_input(guest, 5))
    answers = await asyncio.gather(*[guest.submit(requests.bulk_in(0x82, 512)) for _ in range(16)])
    print("parallel:", sum(len(answer.data) for answer in answers), "bytes")
    await guest.bulk_out(0x01, b"there and back")
    print("loopback:", bytes((await guest.bulk_in(0x81, 64)).data))
    print("input:   ", await watching)
    print("timeout: ", Status((await guest.bulk_in(0x86, 64, timeout=0.05)).status).name)
    silent = asyncio.create_task(guest.bulk_in(0x86, 64))
    await guest.get_configuration()
    silent.cancel()  # the host cancels the transfer
    await asyncio.wait([silent])
    print("cancelled:", silent.cancelled())


async def main() -> None:
    """Connect, wait for the device, use it."""
    if len(sys.argv) > 1:
        async with aio.connect(sys.argv[1]) as guest:
            await guest.wait_for_device(5)
            await describe(guest)
        return
    async with await aio.serve(LoopbackDevice, "127.0.0.1:0") as server, aio.connect(str(server.address)) as guest:
        await guest.wait_for_device(5)
        await describe(guest)
        await try_endpoints(guest)


if __name__ == "__main__":
    asyncio.run(main())
