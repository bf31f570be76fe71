# Common to all machines: disk and boot loader, the two network interfaces, ssh, the kernel settings
# that Kubernetes needs, and the owners of keys and kubeconfigs.
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
    # It holds the boot loader's random seed: for root only.
    options = [ "umask=0077" ];
  };

  boot.loader.systemd-boot = {
    enable = true;
    # Previous generations stay in the menu for a roll back. On arm64, a kernel and its initrd take
    # about 100 MB of the ESP.
    configurationLimit = 3;
  };
  # EFI variables can be lost (a restored snapshot, a new host); the boot loader's fallback path is
  # on the disk.
  boot.loader.efi.canTouchEfiVariables = false;
  boot.loader.timeout = 1;

  boot.initrd.availableKernelModules = [
    "virtio_pci"
    "virtio_blk"
  ];

  boot.kernelParams = [
    # When three emulated machines boot at the same time, disks and consoles can take longer than
    # the default of 90 seconds to appear.
    "systemd.default_device_timeout_sec=15min"
    # systemd writes to the last console: QEMU's serial port, which is logged on the host.
    "console=tty0"
    "console=${if pkgs.stdenv.hostPlatform.isAarch64 then "ttyAMA0" else "ttyS0"},115200n8"
  ];

  # ── Network ────────────────────────────────────────────────────────────────────────────────
  networking.hostName = node.name;
  networking.useNetworkd = true;
  networking.useDHCP = false;

  # Interfaces are matched by MAC address: their names and slots depend on host and QEMU.
  systemd.network.links."10-outside" = {
    matchConfig.PermanentMACAddress = node.mac;
    linkConfig.Name = "outside";
  };
  systemd.network.links."10-lan" = {
    matchConfig.PermanentMACAddress = node.lanMac;
    linkConfig.Name = "lan";
  };

  # To the internet, and from the host. Its address is 10.0.2.15 on every machine, so the cluster
  # cannot use it.
  systemd.network.networks."10-outside" = {
    matchConfig.PermanentMACAddress = node.mac;
    networkConfig = {
      DHCP = "ipv4";
      # QEMU announces an IPv6 prefix that is not routed on most hosts.
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

  # networkd must not remove the routes and rules that Cilium adds when it restarts.
  systemd.network.config.networkConfig = {
    ManageForeignRoutes = false;
    ManageForeignRoutingPolicyRules = false;
  };

  networking.hosts = {
    # NixOS maps a machine's own name to this address; here a name is the LAN address everywhere.
    "127.0.0.2" = lib.mkForce [ ];
  }
  // lib.listToAttrs (map (machine: lib.nameValuePair machine.ip [ machine.name ]) cluster.nodes);

  # No NixOS firewall. QEMU forwards only ports of the host's loopback, and the LAN connects only
  # these machines; what listens there requires a certificate, except for health checks and metrics
  # of Cilium. Cilium or kube-proxy own the rules for services and pods; a second set (the reverse
  # path filter above all) would drop pod traffic.
  networking.firewall.enable = false;

  networking.proxy = {
    httpProxy = lib.mkIf (proxy.http != "") proxy.http;
    httpsProxy = lib.mkIf (proxy.https != "") proxy.https;
    noProxy = lib.mkIf (proxy.http != "" || proxy.https != "") (lib.concatStringsSep "," proxy.no);
  };
  security.pki.certificateFiles = lib.optional proxy.ca ./proxy-ca.pem;

  # Certificates and leases are invalid on a machine whose clock is wrong. After the host was asleep
  # a machine's clock lags; QEMU's real-time clock does not, and needs no internet. (The drop-in, as
  # the option for it has another name in each release.)
  services.timesyncd.enable = true;
  environment.etc."systemd/timesyncd.conf.d/10-poll.conf".text = ''
    [Time]
    PollIntervalMaxSec=64
  '';
  systemd.timers.clock-from-rtc = {
    description = "Compare the clock with the real-time clock";
    wantedBy = [ "timers.target" ];
    timerConfig = {
      OnBootSec = "30s";
      OnUnitInactiveSec = "30s";
      AccuracySec = "5s";
    };
  };
  systemd.services.clock-from-rtc = {
    description = "Set the clock if it is more than two seconds off";
    unitConfig.ConditionPathExists = "/sys/class/rtc/rtc0/since_epoch";
    serviceConfig = {
      Type = "oneshot";
      # systemd reads $$ as $, and %% as %.
      ExecStart = "${pkgs.runtimeShell} -c 'rtc=$$(cat /sys/class/rtc/rtc0/since_epoch); off=$$(($$(date +%%s) - rtc)); [ $${off#-} -le 2 ] || date --utc --set=@$$rtc'";
    };
  };
  time.timeZone = "UTC";

  # ── Access ─────────────────────────────────────────────────────────────────────────────────
  services.openssh = {
    enable = true;
    # Generated on the host before the installation, so that it is pinned from the first connection.
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
  # No user has a password, and accounts cannot be added by hand.
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
    # The machine forwards the packets of pods. Two names of one kernel setting: NixOS sets the
    # second as well.
    "net.ipv4.ip_forward" = 1;
    "net.ipv4.conf.all.forwarding" = 1;
    # Bridged packets (of the stock CNI plugins) pass the service rules as routed ones do.
    "net.bridge.bridge-nf-call-iptables" = 1;
    "net.bridge.bridge-nf-call-ip6tables" = 1;
    # A reply may leave by another interface than its request came by. Cilium needs this; bpffs and
    # cgroup2, which it needs as well, are mounted by systemd.
    "net.ipv4.conf.all.rp_filter" = 0;
    "net.ipv4.conf.default.rp_filter" = 0;
    "net.ipv4.conf.*.rp_filter" = 0;
  };

  # ── Keys and kubeconfigs ───────────────────────────────────────────────────────────────────
  # They are copied as root, before their users exist. At boot and at each switch these rules give
  # each file to the user that reads it. (Not as Nix paths: those are copied to the store, which is
  # world-readable.)
  systemd.tmpfiles.rules = [
    "d /var/lib/kubernetes 0755 root root -"
    "d /var/lib/kubernetes/pki 0755 root root -"
    "z /var/lib/kubernetes/pki/ca.pem 0644 root root -"
    "z /etc/ssh/ssh_host_ed25519_key 0600 root root -"
    "z /etc/ssh/ssh_host_ed25519_key.pub 0644 root root -"
  ];
  # A renewed key needs its owner set as well, although its rule has not changed.
  systemd.services.systemd-tmpfiles-resetup.restartTriggers = lib.attrValues cluster.digests;

  # ── Disk space ─────────────────────────────────────────────────────────────────────────────
  # Every reconfig keeps the generation before it, and a disk is small.
  nix.gc = {
    automatic = true;
    dates = "weekly";
    options = "--delete-older-than 30d";
  };
  # What a build needs stays, so that a changed setting can be built without a download.
  nix.settings.keep-outputs = true;

  # ── The rest ───────────────────────────────────────────────────────────────────────────────
  environment.systemPackages = [
    pkgs.curl
    pkgs.jq
    pkgs.rsync
  ];
  environment.defaultPackages = [ ];
  documentation.enable = false;

  # The release of the first installation. It defines the format of existing state and stays the
  # same when the channel changes.
  system.stateVersion = "26.05";
}
