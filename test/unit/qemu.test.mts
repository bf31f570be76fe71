import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import type { Host } from '../../lib/host.mts'
import { type Mode, qemuArguments } from '../../lib/qemu.mts'

const cluster = loadCluster({ env: {} })
const [alpha, sigma] = cluster.nodes as [(typeof cluster.nodes)[0], (typeof cluster.nodes)[0]]
const install: Mode = { kind: 'install', iso: '/isos/nixos.iso' }
const boot: Mode = { kind: 'boot' }

function host(os: Host['os'], arch: Host['arch'], accel: Host['accel'], version = '10.1.0'): Host {
  return {
    os,
    arch,
    accel,
    qemu: { path: `/usr/bin/qemu-system-${arch}`, version },
    firmware: {
      code: { path: '/fw/code.fd', format: 'raw' },
      vars: { path: '/fw/vars.fd', format: 'raw' },
    },
  }
}

const linux = host('linux', 'x86_64', 'kvm')

function argumentsOf(mode: Mode, options: { host?: Host; node?: typeof alpha } = {}): string[] {
  const { node = alpha } = options
  return qemuArguments({ cluster, node, host: options.host ?? linux, mode })
}

/** What follows each occurrence of a flag. */
function valuesOf(flag: string, args: string[]): string[] {
  return args.flatMap((arg, index) => (arg === flag ? [args[index + 1] ?? ''] : []))
}

describe('the arguments of QEMU', () => {
  for (const { name, on, machine, accel, cpu, cdrom } of [
    {
      name: 'macOS on an Apple chip',
      on: host('darwin', 'aarch64', 'hvf'),
      machine: 'virt',
      accel: 'hvf',
      cpu: 'host',
      cdrom: ['virtio-scsi-pci', 'scsi-cd,drive=iso,bootindex=2'],
    },
    {
      // From 11.1 on QEMU uses Apple's interrupt controller by default, with which Linux stalls.
      name: 'macOS on an Apple chip with QEMU 11.1',
      on: host('darwin', 'aarch64', 'hvf', '11.1.0'),
      machine: 'virt',
      accel: 'hvf,kernel-irqchip=off',
      cpu: 'host',
      cdrom: ['virtio-scsi-pci', 'scsi-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'macOS on an Intel processor with QEMU 11.1',
      on: host('darwin', 'x86_64', 'hvf', '11.1.0'),
      machine: 'q35',
      accel: 'hvf',
      cpu: 'host,-avx512vl,-pdpe1gb',
      cdrom: ['ide-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'Linux on arm64 with QEMU 11.1',
      on: host('linux', 'aarch64', 'kvm', '11.1.0'),
      machine: 'virt',
      accel: 'kvm',
      cpu: 'host',
      cdrom: ['virtio-scsi-pci', 'scsi-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'macOS on an Intel processor',
      on: host('darwin', 'x86_64', 'hvf'),
      machine: 'q35',
      accel: 'hvf',
      cpu: 'host,-avx512vl,-pdpe1gb',
      cdrom: ['ide-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'Linux on x86_64',
      on: linux,
      machine: 'q35',
      accel: 'kvm',
      cpu: 'host',
      cdrom: ['ide-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'Linux on x86_64 without KVM',
      on: host('linux', 'x86_64', 'tcg'),
      machine: 'q35',
      accel: 'tcg',
      cpu: 'max,-cx16',
      cdrom: ['ide-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'Linux on arm64',
      on: host('linux', 'aarch64', 'kvm'),
      machine: 'virt',
      accel: 'kvm',
      cpu: 'host',
      cdrom: ['virtio-scsi-pci', 'scsi-cd,drive=iso,bootindex=2'],
    },
    {
      name: 'Linux on arm64 without KVM',
      on: host('linux', 'aarch64', 'tcg'),
      machine: 'virt',
      accel: 'tcg',
      cpu: 'max,pauth-impdef=on',
      cdrom: ['virtio-scsi-pci', 'scsi-cd,drive=iso,bootindex=2'],
    },
  ] as const) {
    it(`fit ${name}`, () => {
      const args = argumentsOf(boot, { host: on })
      assert.deepEqual(valuesOf('-machine', args), [machine])
      assert.deepEqual(valuesOf('-accel', args), [accel])
      assert.deepEqual(valuesOf('-cpu', args), [cpu])

      const drives = (list: string[]) =>
        valuesOf('-device', list).filter((device) => /^virtio-scsi|-cd,/.test(device))
      assert.deepEqual(drives(args), [], 'a booted machine has no cdrom')
      assert.deepEqual(drives(argumentsOf(install, { host: on })), cdrom)
    })
  }

  it('are these for alpha on Linux with KVM', () => {
    const { root } = cluster
    assert.deepEqual(argumentsOf(boot), [
      ...['-name', 'alpha', '-nodefaults', '-no-user-config'],
      ...['-machine', 'q35', '-accel', 'kvm', '-cpu', 'host', '-smp', '2', '-m', '8192'],
      ...['-display', 'none', '-rtc', 'base=utc', '-device', 'virtio-rng-pci'],
      ...['-drive', 'if=pflash,unit=0,format=raw,readonly=on,file=/fw/code.fd'],
      ...[
        '-drive',
        `if=pflash,unit=1,format=qcow2,node-name=efivars,file=${root}/images/alpha.efivars.qcow2`,
      ],
      ...['-pidfile', `${root}/run/alpha.pid`],
      ...['-chardev', 'socket,id=qmp,path=alpha.qmp,server=on,wait=off'],
      ...['-mon', 'chardev=qmp,mode=control'],
      '-drive',
      `if=none,id=disk,node-name=disk0,format=qcow2,discard=unmap,cache=writeback,file=${root}/images/alpha.qcow2`,
      ...['-device', 'virtio-blk-pci,drive=disk,bootindex=1'],
      '-netdev',
      'user,id=outside,ipv6=off,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp:127.0.0.1:6443-:6443',
      ...['-device', 'virtio-net-pci,netdev=outside,mac=52:54:00:12:34:56,romfile='],
      '-netdev',
      'dgram,id=lan,local.type=inet,local.host=127.0.0.1,local.port=24110,remote.type=inet,remote.host=127.0.0.1,remote.port=24100',
      ...['-device', 'virtio-net-pci,netdev=lan,mac=52:54:01:12:34:56,romfile='],
      '-chardev',
      `socket,id=console,path=alpha.console,server=on,wait=off,logfile=${root}/images/alpha-console.log,logappend=off`,
      ...['-serial', 'chardev:console'],
    ])
  })

  it('forward the API server to the control plane only', () => {
    const [outside = ''] = valuesOf('-netdev', argumentsOf(boot, { node: sigma }))
    assert.equal(outside, 'user,id=outside,ipv6=off,hostfwd=tcp:127.0.0.1:2223-:22')
  })

  it('open ports on 127.0.0.1 and nowhere else', () => {
    for (const node of cluster.nodes) {
      for (const netdev of valuesOf('-netdev', argumentsOf(boot, { node }))) {
        for (const [, address] of netdev.matchAll(/(?:hostfwd=tcp:|\.host=)([^:,]*)/g)) {
          assert.equal(address, '127.0.0.1', netdev)
        }
      }
    }
  })

  it('give every network card of every machine a MAC address of its own', () => {
    const macs = cluster.nodes.flatMap((node) =>
      valuesOf('-device', argumentsOf(boot, { node })).flatMap(
        (device) => device.match(/mac=([^,]*)/)?.[1] ?? [],
      ),
    )
    assert.equal(macs.length, 2 * cluster.nodes.length)
    assert.equal(new Set(macs).size, macs.length)
  })

  it('let a running machine reboot itself, and end the installer instead', () => {
    assert.ok(!argumentsOf(boot).includes('-no-reboot'))
    assert.ok(argumentsOf(install).includes('-no-reboot'))
  })

  it('install on the partial disk, with the console on stdin and stdout and no port open', () => {
    const args = argumentsOf(install)
    const drives = valuesOf('-drive', args).join('\n')
    assert.match(drives, /file=.*alpha\.qcow2\.partial$/m)
    assert.match(drives, /media=cdrom,format=raw,readonly=on,file=\/isos\/nixos\.iso/)
    assert.deepEqual(valuesOf('-netdev', args), ['user,id=outside,ipv6=off'])
    assert.ok(valuesOf('-chardev', args).includes('stdio,id=console,signal=off'))
    assert.ok(!args.includes('-kernel'))
  })

  it('start the kernel directly where the installer asks for it, still with UEFI and cdrom', () => {
    const kernel = { kernel: '/t/bzImage', initrd: '/t/initrd', append: 'init=/x console=ttyS0' }
    const args = argumentsOf({ ...install, kernel })
    assert.deepEqual(valuesOf('-kernel', args), ['/t/bzImage'])
    assert.deepEqual(valuesOf('-initrd', args), ['/t/initrd'])
    assert.deepEqual(valuesOf('-append', args), ['init=/x console=ttyS0'])
    assert.match(valuesOf('-drive', args).join('\n'), /pflash[\s\S]*media=cdrom/)
  })

  it('double a comma in a path, which would end the option', () => {
    const args = argumentsOf({ kind: 'install', iso: '/a,b/nixos.iso' })
    assert.match(valuesOf('-drive', args).join('\n'), /file=\/a,,b\/nixos\.iso/)
  })

  it('name no unix socket by a path, which may be too long for one', () => {
    for (const chardev of valuesOf('-chardev', argumentsOf(boot))) {
      assert.doesNotMatch(chardev, /path=[^,]*\//)
    }
  })

  it('follow the disk cache of cluster.env and the format of the firmware', () => {
    const unsafe = loadCluster({ env: { QEMU_DISK_CACHE: 'unsafe' } })
    const qcow2: Host = {
      ...linux,
      firmware: {
        code: { path: '/fw/code.qcow2', format: 'qcow2' },
        vars: { path: '/fw/vars.qcow2', format: 'qcow2' },
      },
    }
    const args = qemuArguments({
      cluster: unsafe,
      node: unsafe.controlPlane,
      host: qcow2,
      mode: boot,
    })
    const drives = valuesOf('-drive', args)
    assert.match(drives[0] ?? '', /unit=0,format=qcow2,readonly=on/)
    assert.match(drives[1] ?? '', /unit=1,format=qcow2/)
    assert.match(drives[2] ?? '', /cache=unsafe/)
  })
})
