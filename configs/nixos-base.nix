# What every machine has: disk and boot loader, the two network cards, ssh, the kernel settings
# of Kubernetes, and the owners of keys and kubeconfigs.
{
  cluster,
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (cluster) node proxy;
  others = builtins.filter (other: other.name != node.name) cluster.nodes;
  withPods = builtins.filter (other: other.podCidr != null) others;
in
{
  # ── Disk and boot ──────────────────────────────────────────────────────────────────────────
  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  fileSystems."/boot" = {
    device = "/dev/disk/by-label/ESP";
    fsType = "vfat";
    # The boot loader's random seed is there; nobody but root needs to look.
    options = [ "umask=0077" ];
  };

  boot.loader.systemd-boot = {
    enable = true;
    # Older generations stay in the menu to fall back on; more would fill the ESP with kernels.
    configurationLimit = 5;
  };
  # A machine's EFI variables can be lost (a restored snapshot, a new host), the boot loader's
  # fallback path on the disk cannot.
  boot.loader.efi.canTouchEfiVariables = false;
  boot.loader.timeout = 1;

  boot.initrd.availableKernelModules = [
    "virtio_pci"
    "virtio_blk"
  ];

  boot.kernelParams = [
    # Three machines that boot at once under emulation keep each other waiting for disks and
    # consoles longer than the default of 90 seconds.
    "systemd.default_device_timeout_sec=15min"
    # The last console is where systemd writes: QEMU's serial port, kept in a log on the host.
    "console=tty0"
    "console=${if pkgs.stdenv.hostPlatform.isAarch64 then "ttyAMA0" else "ttyS0"},115200n8"
  ];

  # ── Network ────────────────────────────────────────────────────────────────────────────────
  networking.hostName = node.name;
  networking.useNetworkd = true;
  networking.useDHCP = false;

  # Cards are told apart by MAC: which name or slot they have depends on host and QEMU.
  systemd.network.links."10-outside" = {
    matchConfig.PermanentMACAddress = node.mac;
    linkConfig.Name = "outside";
  };
  systemd.network.links."10-lan" = {
    matchConfig.PermanentMACAddress = node.lanMac;
    linkConfig.Name = "lan";
  };

  # To the internet, and the way in for the host. Its address is 10.0.2.15 on every machine, so
  # nothing of the cluster may use it.
  systemd.network.networks."10-outside" = {
    matchConfig.PermanentMACAddress = node.mac;
    networkConfig = {
      DHCP = "ipv4";
      # QEMU announces an IPv6 prefix that leads nowhere on most hosts.
      IPv6AcceptRA = false;
    };
  };

  # The machines' own Ethernet. Pods of a worker are reached through that worker; the control
  # plane has these routes too, so that the API server reaches webhooks and metrics-server.
  systemd.network.networks."10-lan" = {
    matchConfig.PermanentMACAddress = node.lanMac;
    address = [ "${node.ip}/${toString cluster.lanPrefixLength}" ];
    networkConfig = {
      LinkLocalAddressing = false;
      IPv6AcceptRA = false;
    };
    routes = map (worker: {
      Destination = worker.podCidr;
      Gateway = worker.ip;
    }) withPods;
  };

  # Routes and rules that Cilium adds are not networkd's to remove when it restarts.
  systemd.network.config.networkConfig = {
    ManageForeignRoutes = false;
    ManageForeignRoutingPolicyRules = false;
  };

  networking.hosts = {
    # NixOS maps a machine's own name to this; here a name means the lan address everywhere.
    "127.0.0.2" = lib.mkForce [ ];
  }
  // lib.listToAttrs (map (machine: lib.nameValuePair machine.ip [ machine.name ]) cluster.nodes);

  # No packet filter of NixOS' own. QEMU lets in only the forwards on the host's loopback, the
  # lan has no members but these machines, and what listens on it asks for a certificate. Rules
  # for services and pods are Cilium's or kube-proxy's; a second hand in them (the reverse path
  # filter above all) drops traffic between pods.
  networking.firewall.enable = false;

  networking.proxy = {
    httpProxy = lib.mkIf (proxy.http != "") proxy.http;
    httpsProxy = lib.mkIf (proxy.https != "") proxy.https;
    noProxy = lib.mkIf (proxy.http != "" || proxy.https != "") (lib.concatStringsSep "," proxy.no);
  };
  security.pki.certificateFiles = lib.optional proxy.ca ./proxy-ca.pem;

  # Certificates and leases are worth nothing on a machine that has the time wrong.
  services.timesyncd.enable = true;
  time.timeZone = "UTC";

  # ── Access ─────────────────────────────────────────────────────────────────────────────────
  services.openssh = {
    enable = true;
    # Made on the host before the machine was, so that the host knows it at the first connection.
    hostKeys = [
      {
        path = "/etc/ssh/ssh_host_ed25519_key";
        type = "ed25519";
      }
    ];
    settings = {
      PermitRootLogin = "prohibit-password";
      PasswordAuthentication = false;
      KbdInteractiveAuthentication = false;
    };
  };
  # No user has a password, root's is locked, and no account can be added by hand.
  users.mutableUsers = false;
  users.users.root = {
    hashedPassword = "!";
    openssh.authorizedKeys.keys = cluster.sshKeys;
  };

  # ── Kernel ─────────────────────────────────────────────────────────────────────────────────
  boot.kernelModules = [
    "br_netfilter"
    "overlay"
  ];
  boot.kernel.sysctl = {
    # Pods' packets pass through the machine. One switch of the kernel under two names: NixOS
    # writes the second, too.
    "net.ipv4.ip_forward" = 1;
    "net.ipv4.conf.all.forwarding" = 1;
    # Packets over a bridge (the stock CNI plugins') meet the service rules as routed ones do.
    "net.bridge.bridge-nf-call-iptables" = 1;
    "net.bridge.bridge-nf-call-ip6tables" = 1;
    # An answer may leave by another card than the question came by. Cilium asks for this; the rest
    # that it needs, bpffs and cgroup2, systemd has mounted.
    "net.ipv4.conf.all.rp_filter" = 0;
    "net.ipv4.conf.default.rp_filter" = 0;
    "net.ipv4.conf.*.rp_filter" = 0;
  };

  # ── Keys and kubeconfigs ───────────────────────────────────────────────────────────────────
  # They arrive root-owned, before their users exist. At boot and at each switch these rules
  # hand each to the user that reads it, and to nobody else. (No Nix paths: whatever is one is
  # copied to the store, where everybody may read it.)
  systemd.tmpfiles.rules = [
    "d /var/lib/kubernetes 0755 root root -"
    "d /var/lib/kubernetes/pki 0755 root root -"
    "z /var/lib/kubernetes/pki/ca.pem 0644 root root -"
    "z /etc/ssh/ssh_host_ed25519_key 0600 root root -"
    "z /etc/ssh/ssh_host_ed25519_key.pub 0644 root root -"
  ];
  # A new key under an old rule has to be handed over as well.
  systemd.services.systemd-tmpfiles-resetup.restartTriggers = lib.attrValues cluster.digests;

  # ── The rest ───────────────────────────────────────────────────────────────────────────────
  environment.systemPackages = [
    pkgs.curl
    pkgs.jq
  ];
  environment.defaultPackages = [ ];
  documentation.enable = false;

  # The release that this machine was first installed with. It says how to read old state and
  # stays when the channel moves on.
  system.stateVersion = "26.05";
}
