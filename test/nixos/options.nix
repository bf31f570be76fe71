# Every option that our modules set, with its type and default, checked by hand against the
# modules of NixOS 26.05 (the file is named above each group, below nixos/modules/). What is not
# in this table does not exist for the evaluation, whatever the real NixOS has.
lib:

let
  types = import ./types.nix lib;
  inherit (import ./store.nix) storePath;
  inherit (types)
    attrsOf
    bool
    data
    enum
    fields
    int
    lines
    listOf
    matching
    nullOr
    oneOf
    package
    path
    port
    str
    unitOption
    unsigned
    unspecified
    ;

  required = type: { inherit type; };
  option = type: default: { inherit type default; };
  # A default that follows from the options beside it.
  derived = type: defaultFrom: { inherit type defaultFrom; };

  settings = names: builtins.listToAttrs (map (name: lib.nameValuePair name unitOption) names);

  mac = matching "([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}";
  # networkd's yes and no.
  yesOrNo = enum [
    true
    false
    "yes"
    "no"
  ];
in
{
  # system/boot/kernel.nix, config/sysctl.nix
  "boot.kernelModules" = option (listOf str) [ ];
  "boot.kernelParams" = option (listOf str) [ ];
  "boot.initrd.availableKernelModules" = option (listOf str) [ ];
  "boot.kernel.sysctl" = option (attrsOf (nullOr (oneOf [ bool int str ]))) { };

  # system/boot/loader/{loader,efi}.nix, system/boot/loader/systemd-boot/systemd-boot.nix
  "boot.loader.timeout" = option (nullOr int) 5;
  "boot.loader.efi.canTouchEfiVariables" = option bool false;
  "boot.loader.systemd-boot.enable" = option bool false;
  "boot.loader.systemd-boot.configurationLimit" = option (nullOr int) null;

  # tasks/filesystems.nix: fsType has had no default since 26.05
  "fileSystems.<name>.device" = option (nullOr str) null;
  "fileSystems.<name>.fsType" = required str;
  "fileSystems.<name>.options" = option (listOf str) [ "defaults" ];

  # tasks/network-interfaces.nix, config/networking.nix, services/networking/firewall.nix
  "networking.hostName" = option (matching "([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?") "nixos";
  "networking.useNetworkd" = option bool false;
  "networking.useDHCP" = option bool true;
  "networking.hosts" = option (attrsOf (listOf str)) { };
  "networking.firewall.enable" = option bool true;
  "networking.proxy.httpProxy" = option (nullOr str) null;
  "networking.proxy.httpsProxy" = option (nullOr str) null;
  "networking.proxy.noProxy" = option (nullOr str) null;
  "networking.proxy.envVars" = option (attrsOf str) { };

  # system/boot/networkd.nix: each section takes only the fields that networkd has
  "systemd.network.config.networkConfig" = option (fields {
    ManageForeignRoutes = yesOrNo;
    ManageForeignRoutingPolicyRules = yesOrNo;
    ManageForeignNextHops = yesOrNo;
  }) { };
  "systemd.network.links.<name>.matchConfig" = option (fields {
    PermanentMACAddress = mac;
    OriginalName = str;
  }) { };
  "systemd.network.links.<name>.linkConfig" = option (fields {
    Name = str;
    MACAddressPolicy = enum [
      "persistent"
      "random"
      "none"
    ];
  }) { };
  "systemd.network.networks.<name>.matchConfig" = option (fields {
    PermanentMACAddress = mac;
    Name = str;
  }) { };
  "systemd.network.networks.<name>.networkConfig" = option (fields {
    DHCP = enum [
      true
      false
      "yes"
      "no"
      "ipv4"
      "ipv6"
    ];
    IPv6AcceptRA = yesOrNo;
    LinkLocalAddressing = enum [
      true
      false
      "yes"
      "no"
      "ipv4"
      "ipv6"
    ];
  }) { };
  "systemd.network.networks.<name>.address" = option (listOf str) [ ];
  "systemd.network.networks.<name>.routes" = option (listOf (fields {
    Destination = str;
    Gateway = str;
  })) [ ];

  # system/boot/systemd.nix takes any name there, of which systemd would ignore a misspelt one
  "systemd.settings.Manager" = option (fields (settings [ "DefaultTimeoutStopSec" ])) { };

  # system/boot/systemd.nix, through nixos/lib/systemd-unit-options.nix
  "systemd.services.<name>.description" = option str "";
  "systemd.services.<name>.documentation" = option (listOf str) [ ];
  "systemd.services.<name>.after" = option (listOf str) [ ];
  "systemd.services.<name>.before" = option (listOf str) [ ];
  "systemd.services.<name>.wants" = option (listOf str) [ ];
  "systemd.services.<name>.requires" = option (listOf str) [ ];
  "systemd.services.<name>.wantedBy" = option (listOf str) [ ];
  "systemd.services.<name>.requiredBy" = option (listOf str) [ ];
  "systemd.services.<name>.path" = option (listOf (oneOf [ package str ])) [ ];
  "systemd.services.<name>.environment" = option (attrsOf (
    nullOr (oneOf [
      str
      path
      package
    ])
  )) { };
  "systemd.services.<name>.restartTriggers" = option (listOf unspecified) [ ];
  "systemd.services.<name>.startLimitIntervalSec" = option (nullOr unsigned) null;
  # NixOS takes any name in these two; systemd would ignore a misspelt one, so here it fails.
  "systemd.services.<name>.unitConfig" = option (fields (settings [
    "ConditionPathExists"
    "DefaultDependencies"
    "StartLimitBurst"
    "StartLimitIntervalSec"
  ])) { };
  "systemd.services.<name>.serviceConfig" = option (fields (
    settings [
      "Delegate"
      "ExecStart"
      "ExecStartPre"
      "Group"
      "KillMode"
      "LimitCORE"
      "LimitNOFILE"
      "LimitNPROC"
      "LogsDirectory"
      "LogsDirectoryMode"
      "NoNewPrivileges"
      "OOMScoreAdjust"
      "PrivateDevices"
      "PrivateTmp"
      "ProtectHome"
      "ProtectSystem"
      "RemainAfterExit"
      "RestartSec"
      "RuntimeDirectory"
      "RuntimeDirectoryPreserve"
      "StateDirectory"
      "StateDirectoryMode"
      "SuccessExitStatus"
      "TasksMax"
      "TimeoutStartSec"
      "User"
    ]
    // {
      Type = enum [
        "exec"
        "notify"
        "oneshot"
        "simple"
      ];
      Restart = enum [
        "always"
        "no"
        "on-failure"
      ];
    }
  )) { };

  "systemd.timers.<name>.description" = option str "";
  "systemd.timers.<name>.wantedBy" = option (listOf str) [ ];
  "systemd.timers.<name>.timerConfig" = option (fields (settings [
    "AccuracySec"
    "OnBootSec"
    "OnUnitActiveSec"
    "OnUnitInactiveSec"
  ])) { };

  # system/boot/systemd/tmpfiles.nix
  "systemd.tmpfiles.rules" = option (listOf str) [ ];

  # services/networking/ssh/sshd.nix: settings is free-form beside the options it names
  "services.openssh.enable" = option bool false;
  "services.openssh.hostKeys" = option (listOf (fields {
    path = path;
    type = str;
    bits = int;
    comment = str;
  })) [ ];
  "services.openssh.settings.PermitRootLogin" = option (enum [
    "yes"
    "without-password"
    "prohibit-password"
    "forced-commands-only"
    "no"
  ]) "prohibit-password";
  "services.openssh.settings.PasswordAuthentication" = option (nullOr bool) true;
  "services.openssh.settings.KbdInteractiveAuthentication" = option (nullOr bool) true;

  # system/boot/timesyncd.nix, config/locale.nix
  "services.timesyncd.enable" = option bool true;
  "time.timeZone" = option (nullOr str) null;

  # virtualisation/containerd.nix
  "virtualisation.containerd.enable" = option bool false;
  "virtualisation.containerd.settings" = option (attrsOf data) { };
  "virtualisation.containerd.args" = option (attrsOf str) { };

  # config/nix.nix: free-form beside the options it names
  "nix.settings" = option (attrsOf data) { };
  # services/misc/nix-gc.nix
  "nix.gc.automatic" = option bool false;
  "nix.gc.dates" = option (oneOf [ str (listOf str) ]) "03:15";
  "nix.gc.options" = option str "";

  # config/users-groups.nix, and sshd.nix for authorizedKeys
  "users.mutableUsers" = option bool true;
  "users.users.<name>.isSystemUser" = option bool false;
  "users.users.<name>.uid" = option (nullOr int) null;
  "users.users.<name>.group" = option str "";
  "users.users.<name>.home" = option path "/var/empty";
  "users.users.<name>.shell" = option (nullOr (oneOf [ package path ])) null;
  "users.users.<name>.description" = option str "";
  "users.users.<name>.hashedPassword" = option (nullOr str) null;
  "users.users.<name>.openssh.authorizedKeys.keys" = option (listOf str) [ ];
  "users.groups.<name>.gid" = option (nullOr int) null;

  # config/system-path.nix, system/etc/etc.nix, misc/documentation.nix, security/ca.nix,
  # misc/version.nix, misc/assertions.nix
  "environment.systemPackages" = option (listOf package) [ ];
  "environment.defaultPackages" = option (listOf package) [ ];
  "environment.etc.<name>.text" = option (nullOr lines) null;
  "environment.etc.<name>.source" = derived path (
    loc: self:
    storePath "etc-${baseNameOf (builtins.elemAt loc 2)}" self.text
  );
  "environment.etc.<name>.mode" = option str "symlink";
  "documentation.enable" = option bool true;
  "security.pki.certificateFiles" = option (listOf path) [ ];
  "system.stateVersion" = required (matching "[0-9]{2}\\.[0-9]{2}");
  "assertions" = option (listOf (fields {
    assertion = bool;
    message = str;
  })) [ ];
}
